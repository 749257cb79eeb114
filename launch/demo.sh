#!/usr/bin/env bash
# From a fresh machine to videos with sound: see usage.
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/demo.sh [OUT]

Installs the package into .venv at the top of the repository. This is quick the second time. Then, on the CPU unless
JAX_PLATFORMS names another device:

  1. makes four videos with sound from four prompts, with the reference weights: OUT/000.mp4 to OUT/003.mp4. This took
     35 s on one core of a cloud machine, 21 s of it for compilation. OUT/contact_sheet.png shows frames of all videos
  2. measures the reference weights: a table on the screen, OUT/report/report.html and OUT/report/metrics.json
  3. trains new models for a few steps each: OUT/run. These models are too little trained to make good videos

OUT is the folder for all results, by default `out` at the top of the repository. OUT/compiled keeps compiled programs.
They make a second call quicker. Ctrl-C stops the script.
END
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
# shellcheck disable=SC2119 # no extras are wanted
ensure_venv
SECONDS=0 # the shell counts from here
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/compiled}"

echo "== 1 of 3: videos of four prompts, from the reference weights (about 1 min on two CPU cores)"
cat >"$out/prompts.txt" <<'END'
a red circle moving right
a large blue square moving left
a green triangle moving down
a yellow circle moving up and a magenta square moving left
END
"$PY" -m vdm_jax.sample --prompts="$out/prompts.txt" --out="$out"
echo
echo "$out/000.mp4 is the first video, made $SECONDS s after the installation."
echo "$out/contact_sheet.png shows frames of all four."
echo

echo "== 2 of 3: the table of what the reference weights get right, from 16 clips or prompts of each kind (about 2 min)"
"$PY" -m vdm_jax.evaluate --out="$out/report" --suite=prompts --count=16
echo

echo "== 3 of 3: a few training steps of each of the four models (about 5 min)"
"$PY" -m vdm_jax.train --config=configs/world_tiny.py --workdir="$out/run" \
    --config.log_every=10 --config.validation.every=0 --config.denoiser.cached_clips=256 \
    --config.video_autoencoder.steps=40 --config.audio_autoencoder.steps=40 \
    --config.clip.steps=30 --config.denoiser.steps=30
"$PY" - "$out/run" <<'END'
import json, pathlib, sys

for path in sorted(pathlib.Path(sys.argv[1]).glob("*/metrics.jsonl")):
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if "loss" in row]
    first, last = rows[0], rows[-1]
    print(f"{path.parent.name:>18}: loss {first['loss']:.3f} at step {first['step']}, "
          f"{last['loss']:.3f} at step {last['step']}")
END

echo
echo "made in $((SECONDS / 60)) min $((SECONDS % 60)) s after the installation:"
ls -1 "$out"/*.mp4 "$out/contact_sheet.png" "$out/report/report.html"
