#!/usr/bin/env bash
# ffmpeg with libplacebo and a Vulkan device on the CPU (lavapipe), from Debian's packages, where they can be had (as root):
# what the tests of the shader play a clip with. Safe to run again.
set -eu
if ffmpeg -hide_banner -filters 2>/dev/null | grep -q libplacebo && ls /usr/share/vulkan/icd.d/lvp_icd* >/dev/null 2>&1; then exit 0; fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "ffmpeg with libplacebo is not here: install the packages ffmpeg and mesa-vulkan-drivers; the shader's tests skip without" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends ffmpeg mesa-vulkan-drivers >/dev/null
