"""The paper's experiment: continual-learning methods over orders of tasks, on equal footing."""
