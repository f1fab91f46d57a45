"""The tasks, one folder each: settings, environment, prompt, reward, expert, picture. No Ray, no torch.

Importing this package makes the shipped tasks known, which costs nothing: settings are imported when a configuration
names them, environments when they are made.
"""

from gflowvlm.shared.task_registry import register_place

register_place("numberline", "gflowvlm.envs.numberline.settings:NumberLineSettings")
register_place("blackjack", "gflowvlm.envs.blackjack.settings:BlackjackSettings")
register_place("numbersequence", "gflowvlm.envs.numbersequence.settings:NumberSequenceSettings")
register_place("alfworld", "gflowvlm.envs.household.settings:AlfworldSettings")
