#!/usr/bin/env bash
# Serve a bundle, ask it about an image by curl, and keep the page open while there is a terminal.
#     examples/serve/demo.sh BUNDLE IMAGE QUESTION
set -euo pipefail
bundle=$1 image=$2 question=$3
log=$(mktemp)
"${UHD:-uhd-export}" serve "$bundle" --port "${PORT:-0}" >"$log" &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; rm -f "$log"' EXIT
until grep -q '^http' "$log"; do
    kill -0 "$server" || exit 1 # it has said why
    sleep 0.2
done
address=$(sed 's/: .*//' "$log")
until curl -sf "$address/health" >/dev/null; do sleep 0.1; done
cat "$log"
body=$(mktemp)
# From files: an image is longer than a command line may be.
{
    printf '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,'
    base64 <"$image" | tr -d '\n'
    printf '"}}, {"type": "text", "text": "%s"}]}]}' "$question"
} >"$body"
echo "==> curl: $image, \"$question\""
curl -s -H 'Content-Type: application/json' -d "@$body" "$address/v1/chat/completions"
rm -f "$body"
echo
if [ -t 0 ]; then
    echo "==> the page: $address (Ctrl-C ends)"
    wait "$server" || true
fi
