"""Upper bounds of sizes that a file may state: far beyond real use, and far below what a machine has.

Sizes in a header or a record are checked against these, and against the size of the file, before anything is allocated.
"""

MIB = 2**20

# JSON
JSON_BYTES = 64 * MIB  # a record, a manifest, an index; a million parts would be 60 MiB
LIST_BYTES = 256 * MIB  # a list of items or prompts; a million are 60 to 200
JSON_DEPTH = 64  # objects within objects
DIGITS = 300  # of a whole number; transformers writes 10^30 for "no limit"

# Networks: Wan 14B has 40 layers of width 5120 and 13824, umT5 a vocabulary of 256384
LAYERS = 1024
WIDTH = 2**20
VOCABULARY = 2**24
AXIS = 2**28  # of one array
RANK = 8
PICKLE_BYTES = 64 * MIB  # what a .pt holds besides its arrays; names and shapes of Wan 14B are 200 KiB
NESTED = 8  # state dicts within wrappers

# Text
TOKENIZER_BYTES = 256 * MIB  # umT5's tokenizer.json has 17
SENTINELS = 10_000
TEXT_ROWS = 2**14  # Wan's are 512
CAPTION = 100_000  # characters; dense captions have 5,000
LINE = 2**24  # characters of a line of a table: lists of a thousand captions
COLUMNS = 10_000

# Clips
FRAMES = 2**24  # ten days of 16 frames a second
SIDE = 2**16
PICTURE_PIXELS = 2**26  # 8192 x 8192
VIDEO_PIXELS = 2**25  # 7680 x 4320; a decoder keeps up to 16 such frames
LATENT_NUMBERS = 2**28  # of one record: ten minutes of 480 x 832
STATES = 1000  # of an ODE trajectory; few-step students have 4
TEXT_NUMBERS = 2**26  # of one caption's rows
ARRAY_BYTES = 256 * MIB  # of an array in an archive that is smaller than this
RECORDS = 2**27  # Panda-70M has 70 million
STEPS = 10_000  # of a sampler
