"""The steps that train the micro models, started by make; none of them is a stage of DVC."""
