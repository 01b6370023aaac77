"""The parts of benchmarks/quality.py: texts, methods, rows, compression, fine-tuning, figures."""
