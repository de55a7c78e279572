"""What is asked and how it is judged: problems, prompts, rendered solutions, translations, benchmarks, statistics."""
