# shellcheck shell=bash
# Sourced by the scripts beside it: what their options may be. The script's own `fail` tells what is wrong and exits.

# plain WORD...: none of them holds a line break, or another control character, which would end a line of a script.
plain() {
  local word
  for word in "$@"; do
    [[ "$word" != *[[:cntrl:]]* ]] || fail "$(printf '%q' "$word"): holds a line break or another control character"
  done
}

# whole KEY LEAST [MOST]: the variable KEY is a whole number in these bounds; from then on as one writes it, 08 as 8.
whole() {
  local given="${!1}" most="${3:-999999999}"
  [[ "$given" =~ ^[0-9]{1,9}$ ]] || fail "--$1=$given: must be a whole number, $2 to $most"
  printf -v "$1" '%d' "$((10#$given))"
  [ "${!1}" -ge "$2" ] && [ "${!1}" -le "$most" ] || fail "--$1=$given: must be a whole number, $2 to $most"
}

# word KEY PATTERN WHAT: the variable KEY is empty or all of it fits the extended regular expression.
word() {
  [[ -z "${!1}" || "${!1}" =~ ^($2)$ ]] || fail "--${1//_/-}=${!1}: $3"
}
