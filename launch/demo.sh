#!/usr/bin/env bash
# From a fresh machine to videos with sound: see usage.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: launch/demo.sh [OUT]

Sets up .venv at the top of the repository (quick the second time), then, on the CPU unless JAX_PLATFORMS says otherwise:
  1. trains each stage for a few steps, to show that training works (OUT/run; a second call finds it finished);
  2. makes a video with sound for each of four prompts, with the reference weights that ship with the package;
  3. measures the reference weights: a table here, OUT/report/report.html and OUT/report/metrics.json.

OUT is the folder for all of it, `out` at the top of the repository unless given. OUT/contact_sheet.png shows frames of
every video.
EOF
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
    -*)
        usage >&2
        exit 2
        ;;
esac
(($# <= 1)) || {
    usage >&2
    exit 2
}

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
out="${1:-$ROOT/out}"
mkdir -p "$out"
out="$(cd "$out" && pwd)" # the commands below run at the top of the repository

cd "$ROOT"
# shellcheck disable=SC2119 # no extras, not a forgotten "$@"
ensure_venv
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

echo "== 1. a few training steps of every stage"
"$PY" -m vdm_jax.train --config=configs/world_tiny.py --workdir="$out/run" \
    --config.log_every=10 --config.preview_every=0 --config.denoiser.cached_clips=256 \
    --config.video_autoencoder.steps=40 \
    --config.audio_autoencoder.steps=40 \
    --config.clip.steps=30 \
    --config.denoiser.steps=30
"$PY" - "$out/run" <<'EOF'
import json, pathlib, sys

for path in sorted(pathlib.Path(sys.argv[1]).glob("*/metrics.jsonl")):
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if "loss" in row]
    first, last = rows[0], rows[-1]
    print(f"{path.parent.name:>18}: loss {first['loss']:.3f} at step {first['step']}, "
          f"{last['loss']:.3f} at step {last['step']}")
EOF

echo "== 2. four prompts, from the reference weights"
cat >"$out/prompts.txt" <<'EOF'
a red circle moving right
a large blue square moving left
a green triangle moving down
a yellow circle moving up and a magenta square moving left
EOF
"$PY" -m vdm_jax.sample --prompts="$out/prompts.txt" --out="$out"

echo "== 3. what the reference weights reach"
"$PY" -m vdm_jax.evaluate --out="$out/report" --prompts=32

echo
echo "made in $((SECONDS / 60)) min $((SECONDS % 60)) s:"
ls -1 "$out"/*.mp4 "$out/contact_sheet.png" "$out/report/report.html"
