"""A few optimizer steps of a person's own model and pairs, by every engine there is and by TRL: do they agree?

`arms` makes our engines step, `trl_arm` TRL's trainer, `differences` judges, `lines` says it, and `steps` puts
them together. Knows nothing of Ray or MLflow.
"""
