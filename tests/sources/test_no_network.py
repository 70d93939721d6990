"""Random weights need no network: loading opens no socket and leaves the settings of other libraries alone."""

import json
import os
import subprocess
import sys

import pytest

SOURCES = ["torchvision:resnet18", "torchvision:deeplabv3_resnet50", "timm:resnet18"]
# One interpreter for all of them: PyTorch takes seconds.
LOAD = """
import json, sys

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
seen = {}
assert not opened, opened
for source in sys.argv[1:]:
    opened.clear(), changes.clear()
    rsm_probe.load_model(source, weights=None)
    seen[source] = [list(opened), list(changes), before, constants.HF_HUB_OFFLINE]
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen():
    """Sockets opened, settings changed, and the state of one before and after, for each model."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    code = [sys.executable, "-c", LOAD, *SOURCES]
    ran = subprocess.run(code, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.slow
def test_random_weights_open_no_socket_and_change_no_setting(seen, source):
    assert seen[source] == [[], [], False, False]
