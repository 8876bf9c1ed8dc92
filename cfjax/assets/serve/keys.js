// Action keys: keyboard and touch pad; what is held is sent whenever it changes.

const NAMES = {
  up: ["ArrowUp", "KeyW"], left: ["ArrowLeft", "KeyA"], down: ["ArrowDown", "KeyS"], right: ["ArrowRight", "KeyD"],
};
const ALIASES = { w: "up", a: "left", s: "down", d: "right", forward: "up", back: "down", backward: "down" };
const ARROWS = { up: "M10 15V5M5.5 9.5 10 5l4.5 4.5", left: "M15 10H5M9.5 5.5 5 10l4.5 4.5", down: "M10 5v10M5.5 10.5 10 15l4.5-4.5", right: "M5 10h10M10.5 5.5 15 10l-4.5 4.5" };

// Text boxes and lists keep their keys; of choices only those that move among them are their own.
export const keeps = ({ target, key }) => target.closest("input[type=radio]")
  ? key === " " || key.startsWith("Arrow")
  : target.closest("input, textarea, select, dialog") !== null;

export class Keys {
  #held = new Set(); #send; #buttons = new Map(); #codes = new Map();

  constructor(pad, actions, send) {
    this.#send = send;
    for (const action of actions) {
      const place = ALIASES[action] ?? action;
      for (const code of NAMES[place] ?? [`Key${action.toUpperCase()}`]) this.#codes.set(code, action);
      pad.append(this.#button(action, place));
    }
    document.addEventListener("keydown", (event) => {
      const action = this.#codes.get(event.code);
      if (!action || keeps(event) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();  // arrows would scroll
      if (!event.repeat) this.#hold(action, true);
    });
    document.addEventListener("keyup", (event) => { if (this.#codes.has(event.code)) this.#hold(this.#codes.get(event.code), false); });
    addEventListener("blur", () => this.#release());  // a key let go elsewhere is never told of
    document.addEventListener("visibilitychange", () => { if (document.hidden) this.#release(); });
  }

  has(code) { return this.#codes.has(code); }

  #button(action, place) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = place in ARROWS ? `key ${place}` : "key";
    button.setAttribute("aria-label", action);
    button.setAttribute("aria-pressed", "false");
    button.innerHTML = place in ARROWS ? `<svg viewBox="0 0 20 20" aria-hidden="true"><path d="${ARROWS[place]}"/></svg>` : "";
    if (!button.innerHTML) button.textContent = action;
    button.addEventListener("pointerdown", (event) => { button.setPointerCapture(event.pointerId); this.#hold(action, true); });
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) button.addEventListener(end, () => this.#hold(action, false));
    button.addEventListener("contextmenu", (event) => event.preventDefault());  // a long touch is a long press
    button.addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.repeat) this.#hold(action, true); });
    button.addEventListener("keyup", (event) => { if (event.key === "Enter") this.#hold(action, false); });
    button.addEventListener("blur", () => this.#hold(action, false));
    this.#buttons.set(action, button);
    return button;
  }

  #hold(action, down) {
    if (this.#held.has(action) === down) return;
    if (down) this.#held.add(action);
    else this.#held.delete(action);
    this.#buttons.get(action)?.setAttribute("aria-pressed", String(down));
    this.#send([...this.#held]);
  }

  #release() { [...this.#held].forEach((action) => this.#hold(action, false)); }
}
