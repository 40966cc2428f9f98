"""How configs are proposed: Optuna's samplers, and one of ours that is made of Optuna's TPE."""
