"""One module or folder a task: environment, prompt, parser, reward, expert and picture. No Ray, no torch.

Importing this package registers the tasks with gymnasium: ``gymnasium.make("gflowvlm/NumberLine-v0")``.
"""

import gymnasium

for _name in ("NumberLine", "Blackjack", "NumberSequence"):
    gymnasium.register(id=f"gflowvlm/{_name}-v0", entry_point=f"gflowvlm.envs.{_name.lower()}.environment:{_name}Env")
gymnasium.register(id="gflowvlm/Alfworld-v0", entry_point="gflowvlm.envs.household.environment:AlfworldEnv")
