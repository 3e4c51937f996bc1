"""From a trained model to a proven bundle."""
