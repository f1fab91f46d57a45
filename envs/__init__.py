"""One module or folder a task: environment, prompt, parser, reward, expert and picture. No Ray, no torch.

Importing this package registers the tasks with gymnasium: ``gymnasium.make("gflowvlm/NumberLine-v0")``.
"""

import gymnasium

gymnasium.register(id="gflowvlm/NumberLine-v0", entry_point="envs.numberline.environment:NumberLineEnv")
