"""Runs episodes with a trained policy: `python scripts/evaluate.py runs/Pendulum-v1/… --episodes 20`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from trpo.command_line import CommandParser, at_least, run_command
from trpo.config import Config, EnvConfig
from trpo.config.file import dump_config, parse_config
from trpo.errors import UserError
from trpo.evaluation import Evaluation
from trpo.run.saved_policy import SavedPolicy, load_policy
from trpo.runtime.signals import exit_on_sigterm


def main() -> None:
    args = _parse()
    saved = load_policy(args.policy, device=args.device, trust_code=args.trust_code)
    saved = replace(saved, config=_settings(saved, args))
    with exit_on_sigterm():
        result = saved.evaluate(
            episodes=args.episodes,
            seed=args.seed,
            deterministic=not args.stochastic,
            video=args.video,
            render=args.render,
            trust_code=args.trust_code or args.env is not None,  # what is named here is no policy's
        )
    env = saved.config.env
    if args.json:
        print(json.dumps(_report(saved, env, result, args), allow_nan=False))
        return
    if saved.path.resolve() != args.policy.resolve() and saved.path.name != "final":
        which = "the best so far" if saved.path.name == "best" else "its newest checkpoint"
        print(f"the run has not ended: this is {saved.path}, {which}, after {saved.info['env_steps']} steps")
    print(f"{env.id}, {'stochastic' if args.stochastic else 'deterministic'}: {result}")
    if args.video:
        print(f"video of the first episode: {args.video}")


def _settings(saved: SavedPolicy, args: argparse.Namespace) -> Config:
    """Those of the policy's run, with what is another in this evaluation."""
    config = saved.config
    for change in args.set:
        if not change.startswith(("env.", "evaluation.")):
            raise UserError(f"--set {change}: only env.* and evaluation.* can differ from the policy's run")
    if args.env:
        config = config.model_copy(update={"env": EnvConfig(id=args.env, num_envs=config.env.num_envs)})
    return parse_config(dump_config(config), source=str(saved.path), overrides=args.set) if args.set else config


def _parse() -> argparse.Namespace:
    parser = CommandParser(description="Evaluate a policy: mean, std and median return over whole episodes.")
    parser.add_policy()
    parser.add_argument("--episodes", type=at_least(1), default=20, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="of the first episode, then N+1 (default: %(default)s)"
    )
    parser.add_argument("--stochastic", action="store_true", help="sample actions instead of leaving the noise out")
    show = parser.add_mutually_exclusive_group()
    show.add_argument("--video", type=Path, metavar="FILE", help="write the first episode to an mp4 file")
    show.add_argument("--render", action="store_true", help="show the episodes in a window, one after the other")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--env", metavar="ID", help="another environment than the policy's own, as Gymnasium makes it")
    parser.add_changes("change a setting under env or evaluation, such as env.kwargs.difficulty=5")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or auto (default: %(default)s)")
    return parser.parse_args()


def _report(saved: SavedPolicy, env: EnvConfig, result: Evaluation, args: argparse.Namespace) -> dict[str, object]:
    return {
        "policy": str(saved.path),
        "env": env.id,
        "env_steps": saved.info.get("env_steps"),
        "seed": args.seed,
        "deterministic": not args.stochastic,
        "episodes": args.episodes,
        "mean": result.mean,
        "std": result.std,
        "median": result.median,
        "mean_length": result.mean_length,
        "returns": result.returns,
        "lengths": result.lengths,
        "successes": result.successes,
        "info": result.info,
        "cut": result.cut,
    }


if __name__ == "__main__":
    run_command(main)
