"""The parts of ``tools/build_builtin_data.py``: packages from the npm registry -> ``ett/data/builtin``."""
