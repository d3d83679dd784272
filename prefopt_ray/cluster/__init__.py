"""Sweeps on a Ray cluster, through Ray's own Jobs: submit, follow, ask how far it is, stop.

`client` and `upload` run where a person types; `job` is what the cluster runs, `checks` what it checks first. They
talk in lines of the job's log (`messages`), so a person with the address and the token needs nothing else.
"""
