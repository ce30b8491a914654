"""Reducers that need no training, one in a file: methods of other papers, and simple baselines."""
