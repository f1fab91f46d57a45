"""The tasks, one folder each: settings, environment, prompt, reward, expert, picture. No Ray, no torch.

Importing this package makes the shipped tasks known by their settings, which costs next to nothing: environments are
imported when they are made.
"""

from gflowvlm.envs.blackjack.settings import BlackjackSettings
from gflowvlm.envs.household.settings import AlfworldSettings
from gflowvlm.envs.numberline.settings import NumberLineSettings
from gflowvlm.envs.numbersequence.settings import NumberSequenceSettings
from gflowvlm.shared.task_settings import register_task

for _settings in (NumberLineSettings, BlackjackSettings, NumberSequenceSettings, AlfworldSettings):
    register_task(_settings)
