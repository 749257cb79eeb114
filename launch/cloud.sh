# shellcheck shell=bash
# Sourced by the launch scripts for TPUs and clusters. Options are --name=value. --print shows the commands and runs
# nothing. A script declares its options with `option NAME DEFAULT TEXT` and then calls `parse "$@"`. ${opt[NAME]} is
# the value of an option, and ${rest[@]} holds the arguments after `--`.

declare -A opt=() described=()
order=() rest=()
printing=""
# shellcheck disable=SC2034 # the scripts that source this use it
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

die() {
    echo "error: $*" >&2
    exit 2
}

option() {
    order+=("$1")
    opt[$1]="$2"
    described[$1]="$3"
}

help() {
    local name
    usage
    echo
    echo "options:"
    for name in "${order[@]}"; do
        printf '  --%-24s %s%s\n' "$name=..." "${described[$name]}" "${opt[$name]:+ (${opt[$name]})}"
    done
    printf '  --%-24s %s\n' print "show the commands and run nothing" help "show this text"
}

parse() {
    local argument name
    for argument in "$@"; do
        [[ "$argument" != --help && "$argument" != -h ]] || {
            help
            exit 0
        }
        [[ "$argument" != -- ]] || break
    done
    while (($#)); do
        case "$1" in
            --print) printing=yes ;;
            --)
                shift
                # shellcheck disable=SC2034
                rest=("$@")
                return
                ;;
            --*=*)
                name="${1%%=*}"
                name="${name#--}"
                [[ -v "opt[$name]" ]] || die "unknown option --$name; see --help"
                opt[$name]="${1#*=}"
                ;;
            *) die "unexpected argument '$1': options are --name=value; see --help" ;;
        esac
        shift
    done
}

# Reads the action and the options that the scripts for TPU VMs share. Sets $action and $common.
# $1 is the default accelerator type. The other arguments are those of the script.
tpu_vm() {
    option name "" "name of the TPU VM"
    option zone "" "zone, such as us-west4-a"
    option project "" "project; default: the one that gcloud is set to"
    option type "$1" "accelerator type, which sets the number of chips"
    option version v2-alpha-tpuv5-lite "TPU software version"
    option spot no "yes: spot capacity, which is cheaper and may be taken away"
    option repository "" "git URL of the code"
    option branch main "branch of the repository"
    shift
    [[ "${1:-}" != -* && $# -gt 0 ]] || {
        parse "$@"
        die "an action is missing: give it first, such as create; see --help"
    }
    # shellcheck disable=SC2034
    action="$1"
    shift
    parse "$@"
    need name zone
    common=("--zone=${opt[zone]}")
    [[ -z "${opt[project]}" ]] || common+=("--project=${opt[project]}")
}

need() {
    local name
    for name in "$@"; do
        [[ -n "${opt[$name]}" ]] || die "--$name is missing; see --help"
    done
}

# Runs a command. With --print, shows the command as it could be typed.
run() {
    if [[ -n "$printing" ]]; then
        quoted "$@"
    else
        "$@"
    fi
}

# Writes a command as one line. A shell reads the same words from it.
quoted() {
    local word line=""
    for word in "$@"; do
        if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
            line+="$word "
        else
            line+="'${word//\'/\'\\\'\'}' "
        fi
    done
    echo "${line% }"
}
