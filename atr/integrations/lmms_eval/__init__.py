"""The model `atr` for lmms-eval: any supported model with reduced visual tokens, on any of lmms-eval's tasks.

lmms-eval finds it by an entry point of this package; both are installed in an environment of their own.
"""
