"""Names and purposes of the commands, for the overview and for ``--help``."""

__all__ = ["COMMANDS"]

COMMANDS = {
    "fit": "Train a model, and compress it as the configuration says.",
    "validate": "Evaluate a model on the validation data.",
    "test": "Evaluate a model on the test data.",
    "predict": "Run a model over the prediction data.",
    "report": "Measure a checkpoint: sparsity, parameters, bytes; against a dense one if given.",
    "benchmark": "Time the model of a checkpoint beside the dense one, or exported files.",
    "export": "Write a model for a runtime, run the file there and compare it with torch.",
    "quantize": "Put a trained model on integers or in half precision, and validate it.",
    "analyze": "Cut each channel group alone, evaluate, and derive a plan.",
    "search": "Find how much of each layer to keep under a budget.",
}
