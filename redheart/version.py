"""The one place that names the version (read by setup.cfg without importing anything heavy)."""

VERSION = "0.1.0"
