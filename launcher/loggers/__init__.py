"""Who is shown what is measured: the console, W&B, the profiler."""
