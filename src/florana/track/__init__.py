"""A run's figures in the places where other runs have theirs: TensorBoard, Weights & Biases, MLflow."""
