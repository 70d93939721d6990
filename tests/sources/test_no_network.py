"""Random weights need no network: loading opens no socket and leaves the settings of other libraries alone."""

import os
import subprocess
import sys

import pytest

LOAD = """
import sys

opened = []
sys.addaudithook(lambda event, args: opened.append(event) if event.startswith("socket.") else None)
import rsm_probe
from huggingface_hub import constants

before, changes = constants.HF_HUB_OFFLINE, []
class Watched(type(constants)):
    def __setattr__(self, name, value):
        changes.append((name, value))
        super().__setattr__(name, value)
constants.__class__ = Watched
loaded = rsm_probe.load_model(sys.argv[1], weights=None)
assert not opened, opened
assert not changes, changes
assert before is False is constants.HF_HUB_OFFLINE
"""


@pytest.mark.parametrize("source", ["torchvision:resnet18", "torchvision:deeplabv3_resnet50", "timm:resnet18"])
def test_random_weights_open_no_socket_and_change_no_setting(source):
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    code = [sys.executable, "-c", LOAD, source]
    ran = subprocess.run(code, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
