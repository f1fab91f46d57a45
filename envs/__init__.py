"""One module or folder a task: environment, prompt, parser, reward, expert and picture. No Ray, no torch."""
