"""Playing an exported policy in a simulator: the loop at a fixed rate, plain MuJoCo, and the sweep of perturbations."""
