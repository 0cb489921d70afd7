"""What a process of its own takes, for the tests of peaks."""

import numpy as np


def take(megabytes):
    np.ones(megabytes << 20, np.uint8)
