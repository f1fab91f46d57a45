"""What is done with runs and losses: experiments, comparisons, benchmarks, the proving ground, report pages."""
