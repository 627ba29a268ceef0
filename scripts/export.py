"""Writes a trained policy as an ONNX model: `python scripts/export.py runs/Pendulum-v1/… --onnx policy.onnx`."""

from __future__ import annotations

from pathlib import Path

from trpo.command_line import CommandParser, run_command
from trpo.export import export_onnx
from trpo.run.saved_policy import load_policy


def main() -> None:
    parser = CommandParser(description="Export a policy, with its normaliser and action bounds inside.")
    parser.add_policy()
    parser.add_argument("--onnx", type=Path, required=True, metavar="FILE", help="ONNX model to write")
    args = parser.parse_args()
    saved = load_policy(args.policy, trust_code=args.trust_code)
    export_onnx(saved, args.onnx)
    action = ", ".join(map(str, ("N", *(saved.action_space.shape or ()))))
    print(f"{args.onnx}: the policy in {saved.path}; observation [N, {saved.obs_dim}] float32 → action [{action}]")


if __name__ == "__main__":
    run_command(main)
