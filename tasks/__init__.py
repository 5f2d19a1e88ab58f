"""Plain functions that do the work; none of them knows about Prefect."""

import os

# TensorFlow reads these when it is first imported, so they have to stand before
# any module of this package does that. oneDNN is off by default on some
# processors, where it makes training two to three times faster.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
