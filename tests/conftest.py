"""Settings that every test shares."""

import os
import signal

try:
    import hypothesis
except ModuleNotFoundError:  # a machine with a GPU and little else runs tests/gpu
    hypothesis = None

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores: more threads only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need the network
if hypothesis is not None:
    hypothesis.settings.register_profile("prefopt", deadline=None)  # a busy machine is not a bug
    hypothesis.settings.load_profile("prefopt")

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process they start: the
# journeys send it, and Ray Tune in a notebook ends at once without it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
