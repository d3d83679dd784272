"""What a sweep's folder holds and what follows from it: read and computed without Ray, MLflow or a model."""
