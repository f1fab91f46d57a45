"""The paper's experiments by name: what each varies and measures, and the one engine that runs any of them."""
