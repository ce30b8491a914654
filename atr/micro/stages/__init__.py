"""The steps that train the micro models; run by make, not by DVC."""
