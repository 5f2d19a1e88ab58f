#!/bin/sh
# Read secrets from files, have the code in place, and become the command.
set -eu

# NAME_FILE=/run/secrets/x becomes NAME: no secret is in the container's description.
for pair in $(env | grep -E '^[A-Z0-9_]+_FILE=/run/secrets/[A-Za-z0-9_]+$' || true); do
  name=${pair%%_FILE=*}
  export "$name=$(cat "${pair#*=}")"
  unset "${name}_FILE"
done

# The working folder is a checkout: photos, caches and results lie in it beside the code,
# on one volume, as DVC and the import move files from one to the other. The image's
# code replaces the code of an earlier image; what runs made stays. A clone is left alone, and
# so is the same code: a retrain in another container may be reading it.
code=${IMAGE_CODE:-/opt/handsigns}
backbone=${IMAGE_BACKBONE:-/opt/backbone}

same_code() {
  for path in "$code"/*; do
    case ${path##*/} in
      data.dvc | dvc.lock) [ -e "${path##*/}" ] ;;
      *) diff -rq -x __pycache__ "$path" "${path##*/}" > /dev/null 2>&1 ;;
    esac || return 1
  done
}

lay_out_code() {
  rm -rf flows tasks docker
  for path in "$code"/* "$code"/.dvcignore; do
    case ${path##*/} in
      data.dvc | dvc.lock) [ -e "${path##*/}" ] || cp -p "$path" . ;;
      *) cp -Rp "$path" . ;;
    esac
  done
  mkdir -p .dvc .local/backbone
  cp -p "$backbone"/* .local/backbone/
  cp -p "$code/.dvc/config" .dvc/config
  printf '[core]\n    no_scm = true\n' > .dvc/config.local
}

if [ "$PWD" = "${IMAGE_HOME:-/app}" ] && [ ! -e .git ]; then
  mkdir -p .local
  chmod 700 .local
  exec 9> .local/code.lock
  flock 9
  same_code || lay_out_code
  exec 9>&-
fi
exec "$@"
