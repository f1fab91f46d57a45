"""The parts of a run that live on the cluster: adapter store, replay buffer, policy server, workers, learner."""

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.serve.handle import DeploymentHandle
from ray.train.torch import TorchConfig, TorchTrainer

from gflowvlm.actors.adapter_store import start_adapter_store
from gflowvlm.actors.buffer_actor import create_buffer_actor
from gflowvlm.actors.event_loop import EventLoopEndedError, EventLoopThread
from gflowvlm.actors.policy_client import PolicyClient, PolicyServerError
from gflowvlm.actors.policy_server import deploy_policy_server, scale_policy_server, shutdown_policy_server
from gflowvlm.actors.rollout_worker import RolloutWorker
from gflowvlm.cluster.driver.actor_calls import answer_of
from gflowvlm.cluster.driver.learner_loop import LearnerJob, learner_loop
from gflowvlm.cluster.driver.learner_reports import RemoteMailbox, Report, ReportReceiver, start_mailbox
from gflowvlm.cluster.driver.worker_pool import WorkerPool
from gflowvlm.cluster.launch.placement import LEARNER, NODE_ID_LABEL, ROLLOUT, as_placed, resource_plan
from gflowvlm.run.folder import RunFolder
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError

STOP_TIMEOUT_S = 60.0
SNAPSHOT_TIMEOUT_S = 1.0


class RunActors:
    """Starts a run's parts, and ends them with the run. A context manager, used inside `ray_cluster`.

    Args:
        folder: The run's folder.
        config: The run's configuration.
        model_path: Model directory or hub name.
        say: Called with a line about what is being done.
        append_report: Writes a learner's report down, before the learner goes on.

    Attributes:
        engine: Name of the samplers' engine.
        client: The client of the policy server.
        loop: The event loop that the client's requests of this process are made on.
        buffer: Handle of the replay buffer.
        reports: What the learner has reported.
        workers: The rollout workers.
        learner_error: Why the learner was given up, None while it was not.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        model_path: str,
        say: Callable[[str], None],
        append_report: Callable[[Report], None],
    ) -> None:
        self._folder, self._config, self._model_path, self._say = folder, config, model_path, say
        self._append_report = append_report
        self._name = f"gflowvlm-{uuid.uuid4().hex[:8]}"
        self.engine: str = config.sampler.engine
        self._learner: threading.Thread | None = None
        self.learner_error: BaseException | None = None

    def __enter__(self) -> "RunActors":
        self._say("starting the adapter store, the replay buffer and the policy server")
        # Held, because an actor goes with its last handle.
        self._store = start_adapter_store(
            f"{self._name}-store", self._folder.root, self._config.cluster, self._config.learner.keep_adapters
        )
        self.buffer = create_buffer_actor(self._config, self._folder.root, f"{self._name}-buffer")
        self._mailbox = start_mailbox(f"{self._name}-mailbox")
        self.reports = ReportReceiver(RemoteMailbox(self._mailbox), self._append_report)
        started = time.monotonic()
        try:
            handle = self._deploy_policy_server()
        except BaseException:
            shutdown_policy_server(f"{self._name}-policy")
            raise
        self._say(f"policy server is up ({self.engine}, {time.monotonic() - started:.0f} s)")
        self.client = PolicyClient.from_config(handle, self._config)
        self.loop = EventLoopThread("policy client")
        self.workers = WorkerPool(self._start_worker, calls=self._config.rollout.groups_per_worker, say=self._say)
        self.workers.resize(self._config.rollout.workers)
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._stop_learner()
        finally:
            self.reports.close()
            self.workers.close()
            shutdown_policy_server(f"{self._name}-policy")
            self.loop.close()

    def buffer_stats(self) -> dict[str, Any]:
        """Returns the replay buffer's counts."""
        stats: dict[str, Any] = answer_of(lambda: self.buffer.stats.remote(), "the replay buffer's counts")
        return stats

    def buffer_counts(self) -> dict[str, int]:
        """Returns ``accepted`` and ``buffer_size`` (trajectories); nothing while the buffer is away or busy.

        Raises:
            UserError: It came back to a damaged folder.
        """
        try:
            stats = ray.get(self.buffer.stats.remote(), timeout=SNAPSHOT_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return {}
        return {"accepted": stats["accepted"], "buffer_size": stats["size"]}

    def scale_workers(self, workers: int) -> None:
        """Sets the number of rollout workers; those that leave finish what they play."""
        self.workers.resize(workers)

    def scale_replicas(self, replicas: int) -> None:
        """Sets the number of policy server replicas; those that leave finish the requests that they have.

        Raises:
            UserError: Ray Serve does not take it.
        """
        scale_policy_server(f"{self._name}-policy", replicas)

    def start_learner(self) -> None:
        """Starts the data-parallel learners under Ray Train, in the background, and receives their reports."""
        self.reports.start()
        settings, part = self._config.learner, resource_plan(self._config).part(LEARNER)
        job = LearnerJob(
            config=self._config.model_dump(mode="json"),
            model_path=self._model_path,
            run_dir=str(self._folder.root),
            store_name=f"{self._name}-store",
            buffer_name=f"{self._name}-buffer",
            server_name=f"{self._name}-policy",
            mailbox_name=f"{self._name}-mailbox",
        )
        trainer = TorchTrainer(
            self._learner_loop(),
            train_loop_config=vars(job),
            torch_config=TorchConfig(backend="nccl" if settings.gpus_per_worker > 0 else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=settings.workers,
                use_gpu=settings.gpus_per_worker > 0,
                resources_per_worker={"CPU": part.cpus, "GPU": part.gpus, **part.resources},
                label_selector=dict(part.labels) | self._beside_the_sampler(),
            ),
            run_config=ray.train.RunConfig(
                name=self._name,
                storage_path=str(self._folder.root / "ray_train"),
                failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            ),
        )

        def fit() -> None:
            try:
                trainer.fit()
            except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
                self.learner_error = error
                self._wake_sampler()

        self._learner = threading.Thread(target=fit, name="learner", daemon=True)
        self._learner.start()

    def _beside_the_sampler(self) -> dict[str, str]:
        """Returns the labels of the node whose GPU the learner shares with the sampler, where it does."""
        if self._config.sampler.sleep_level == 0:
            return {}
        nodes = {str(status["node"]) for status in self.loop.run(self.client.status())}
        return {NODE_ID_LABEL: nodes.pop()} if len(nodes) == 1 else {}

    def _wake_sampler(self) -> None:
        """Lets what is still played go on: a learner that was given up may have died while the sampler slept."""
        if self._config.sampler.sleep_level == 0:
            return
        try:
            self.loop.run(self.client.wake_up())
        except (PolicyServerError, EventLoopEndedError, UserError) as error:
            self._say(f"the sampler does not wake up: {error}")

    @property
    def learner_finished(self) -> bool:
        """Whether the learner was started and has ended, well or not."""
        return self._learner is not None and not self._learner.is_alive()

    def _deploy_policy_server(self) -> DeploymentHandle:
        return deploy_policy_server(
            self._config, self._model_path, store_name=f"{self._name}-store", name=f"{self._name}-policy"
        )

    def _learner_loop(self) -> Callable[[dict[str, Any]], None]:
        return learner_loop

    def _start_worker(self, index: int) -> ray.actor.ActorHandle:
        rollout = self._config.rollout
        kind = ray.remote(RolloutWorker).options(
            **resource_plan(as_placed(self._config)).part(ROLLOUT).actor_options(),
            max_restarts=rollout.max_restarts,
            # One call a group, one for an evaluation, and a ping.
            max_concurrency=rollout.groups_per_worker + 2,
        )
        return kind.remote(
            run_config=self._config,
            model_path=self._model_path,
            source=self.client,
            buffer=f"{self._name}-buffer",
            worker_index=index,
        )

    def _stop_learner(self) -> None:
        if self._learner is None or self.learner_finished:
            return
        self._say("stopping: the learner ends its step and writes a checkpoint")
        try:
            ray.get(self.buffer.close.remote(), timeout=STOP_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            self._say(f"the replay buffer did not answer ({type(error).__name__})")
        self._learner.join(timeout=STOP_TIMEOUT_S)
