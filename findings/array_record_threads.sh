#!/usr/bin/env bash
# array_record 0.8.6: the first reader that is opened starts 64 threads, also with max_parallelism:0.
#
# A process that reads one file of ten small records, with the options that ask for no reading ahead and no parallelism,
# has 64 threads more from then on; a hundred further readers add none, and closing all of them ends none. A data loader
# of eight processes on a machine of two cores holds 512 of them.
# Output seen: "before 1 thread, one reader 65, a hundred readers 65, all closed 65".
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check array_record==0.8.6 numpy==2.4.6
OPENBLAS_NUM_THREADS=1 "$folder/venv/bin/python" - "$folder/ten.array_record" <<'PY'
import os
import sys

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

writer = ArrayRecordWriter(sys.argv[1], "group_size:1,uncompressed")
for number in range(10):
    writer.write(bytes([number]) * 100)
writer.close()


def threads():
    return len(os.listdir("/proc/self/task"))


def opened():
    reader = ArrayRecordReader(sys.argv[1], "readahead_buffer_size:0,max_parallelism:0")
    assert reader.read([3]) == [bytes([3]) * 100]
    return reader


counts = [threads()]
readers = [opened()]
counts.append(threads())
readers += [opened() for _ in range(99)]
counts.append(threads())
for reader in readers:
    reader.close()
counts.append(threads())
print("before {} thread, one reader {}, a hundred readers {}, all closed {}".format(*counts))
sys.exit(not (counts[1] - counts[0] >= 64 and counts[1] == counts[2] == counts[3]))
PY
