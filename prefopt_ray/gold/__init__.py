"""The embedded task: a small language whose true reward is known, its tiny base model, its pairs and its scorer."""
