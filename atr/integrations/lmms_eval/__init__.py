"""The model `atr_llava` for lmms-eval: a LLaVA whose visual tokens are reduced, on any of its tasks.

An entry point of this package names it to lmms-eval; the two live in an environment of their own.
"""
