"""Token reduction methods of other papers, and the baselines that every curve is read against."""
