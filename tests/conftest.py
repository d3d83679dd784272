"""Settings that every test shares."""

import os

import hypothesis

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores: more threads only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need the network
hypothesis.settings.register_profile("prefopt", deadline=None)  # a busy machine is not a bug
hypothesis.settings.load_profile("prefopt")
