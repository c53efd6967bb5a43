"""The environment of every test: one thread, no network, no Ray of somebody else's, caches of its own."""

import atexit
import os
import shutil
import tempfile

# Before torch, Ray and the hub client are imported, for they read these once. Worker processes inherit them.
_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",  # loopback only; a local Ray would write a token into the home directory
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)
os.environ.pop("RAY_ADDRESS", None)

if "PEFTSCALE_CACHE" not in os.environ:  # else this is an xdist worker, and the cache is that of the whole call
    _cache = tempfile.mkdtemp(prefix="peftscale-tests-")
    os.environ["PEFTSCALE_CACHE"] = _cache
    os.environ["HF_DATASETS_CACHE"] = os.path.join(_cache, "datasets")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
