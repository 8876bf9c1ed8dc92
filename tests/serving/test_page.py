"""The page in a real browser: what it is asked for is in the pixels of its canvas. `launch/test.sh` installs Chromium.

`CFJAX_PICTURE=FILE.png` also keeps a picture of the page; the README's is made by benchmarks/serve_picture.py.
"""

import io
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import av
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.serving.drawing import MEMORIES, drawing_served
from tests.serving.running import running

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60  # a busy machine may take as long; nothing waits for it otherwise
COLOURS = {"red": (243, 38, 38), "green": (45, 223, 45), "blue": (45, 70, 255)}
