"""Downstream protocols for pre-trained encoders, their pictures, and the demo."""
