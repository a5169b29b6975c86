# The minimal data path of each profile, set up for real with the tools that people use, and traffic through it.
#
# `sh paths.sh PROFILE` answers 0 when traffic went through and 1 when it did not; the last line says why. It shares nothing
# with the probes of `skerry-qualify`: these are iproute2, nftables, iptables, ipset, ipvsadm, wireguard-tools.
#
# The place: `pod` (10.1.0.2) hangs on a bridge of `host` (10.1.0.1, 192.0.2.1); `world` (192.0.2.2) is beside the host and
# has no way back to pods, so that only translated traffic returns.

# The shell would take its own applets of these names.
ip() { /usr/sbin/ip "$@"; }
tc() { /usr/sbin/tc "$@"; }
modprobe() { /sbin/modprobe "$@"; }

fail() { echo "$*"; exit 1; }
# The exit of whatever is last is the exit of a path; its words go to one file, of which the last line counts.
run() { "$@" >/tmp/said 2>&1 || fail "$(echo "$*" | cut -c1-90): $(tail -n 1 /tmp/said | cut -c1-120)"; }
in_pod() { ip netns exec pod "$@"; }
in_host() { ip netns exec host "$@"; }
in_world() { ip netns exec world "$@"; }

down() {
    for one in pod host world b podb; do ip netns del $one 2>/dev/null; done
    rm -rf /tmp/wg* 2>/dev/null
}

# veth A-NAME NETNS-A B-NAME NETNS-B
cable() {
    run ip link add "$1" netns "$2" type veth peer name "$3" netns "$4"
    run ip -n "$2" link set "$1" up
    run ip -n "$4" link set "$3" up
}

up() {
    down
    for one in pod host world; do run ip netns add $one; run ip -n $one link set lo up; done
    run ip -n host link add cni0 type bridge
    run ip -n host addr add 10.1.0.1/24 dev cni0
    run ip -n host link set cni0 up
    cable eth0 pod vethpod host
    run ip -n host link set vethpod master cni0
    run ip -n pod addr add 10.1.0.2/24 dev eth0
    run ip -n pod route add default via 10.1.0.1
    flat
}

# The host and the world, without a bridge.
flat() {
    cable w0 host eth0 world
    run ip -n host addr add 192.0.2.1/24 dev w0
    run ip -n world addr add 192.0.2.2/24 dev eth0
    in_host sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter'
}

# tcp FROM ADDRESS PORT SERVER-NETNS SERVER-PORT: a word goes from a server to a client.
tcp() {
    ip netns exec "$4" sh -c "echo word | timeout 20 nc -l -p $5 >/dev/null 2>&1" &
    server=$!
    for try in 1 2 3 4 5 6 7 8; do
        got=$(ip netns exec "$1" timeout 5 nc -w 3 "$2" "$3" </dev/null 2>/dev/null)
        [ "$got" = word ] && { kill $server 2>/dev/null; wait $server 2>/dev/null; return 0; }
        sleep 0.3
    done
    kill $server 2>/dev/null; wait $server 2>/dev/null
    fail "no traffic from $1 to $2:$3"
}

# What must not come through.
no_tcp() {
    ip netns exec "$4" sh -c "echo word | timeout 10 nc -l -p $5 >/dev/null 2>&1" &
    server=$!
    sleep 0.5
    got=$(ip netns exec "$1" timeout 3 nc -w 2 "$2" "$3" </dev/null 2>/dev/null)
    kill $server 2>/dev/null; wait $server 2>/dev/null
    [ "$got" = word ] && fail "traffic from $1 to $2:$3, though it is forbidden"
    return 0
}

# Which iptables works in this kernel at all: over nf_tables first, as distributions have it. It has to take a match: without
# `nft_compat` only rules without any go through nf_tables.
iptables_of_this_kernel() {
    for one in iptables-nft iptables-legacy; do
        in_host $one -t nat -A POSTROUTING -s 10.99.0.0/24 -m comment --comment x -j ACCEPT >/tmp/said 2>&1 || continue
        in_host $one -t nat -D POSTROUTING -s 10.99.0.0/24 -m comment --comment x -j ACCEPT >/dev/null 2>&1
        echo $one
        return 0
    done
    return 1
}

masquerade() {
    for one in iptables-nft iptables-legacy; do
        in_host $one -t nat -A POSTROUTING -s 10.1.0.0/24 ! -d 10.1.0.0/24 -m comment --comment pods -j MASQUERADE >/tmp/said 2>&1 && return 0
    done
    in_host nft -f - >/tmp/said 2>&1 <<RULES || fail "no way to masquerade: $(tail -n 1 /tmp/said)"
table ip cni { chain post { type nat hook postrouting priority 100; ip saddr 10.1.0.0/24 ip daddr != 10.1.0.0/24 masquerade; }; }
RULES
}

cni_bridge() { up; masquerade; tcp pod 192.0.2.2 7000 world 7000; }

cni_portmap() {
    up
    for one in iptables-nft iptables-legacy; do
        in_host $one -t nat -N DN >/tmp/said 2>&1 || continue
        in_host $one -t nat -A DN -p tcp -m multiport --dports 8080,8081 -m comment --comment port -j DNAT --to-destination 10.1.0.2:80 >/tmp/said 2>&1 || continue
        in_host $one -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DN >/tmp/said 2>&1 || continue
        in_host $one -t nat -A POSTROUTING -m mark --mark 0x2000/0x2000 -j ACCEPT >/tmp/said 2>&1 || continue
        tcp world 192.0.2.1 8080 pod 80
        return 0
    done
    in_host nft -f - >/tmp/said 2>&1 <<RULES || fail "no way to map a port: $(tail -n 1 /tmp/said)"
table ip port { chain pre { type nat hook prerouting priority -100; fib daddr type local tcp dport 8080 dnat to 10.1.0.2:80; }; }
RULES
    tcp world 192.0.2.1 8080 pod 80
}

cni_bandwidth() {
    up
    run ip -n host link add shape type ifb
    run ip -n host link set shape up
    run tc -n host qdisc add dev vethpod root tbf rate 8mbit burst 64kb latency 50ms
    run tc -n host qdisc add dev vethpod handle ffff: ingress
    run tc -n host filter add dev vethpod parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev shape
    run tc -n host qdisc add dev shape root tbf rate 8mbit burst 64kb latency 50ms
    tcp pod 10.1.0.1 7000 host 7000
    tc -n host -s qdisc show dev shape | grep -q 'Sent 0 bytes' && fail "nothing went through the shaper"
    return 0
}

# Two hosts with a pod each; $1 makes the way between them.
flannel() {
    up
    masquerade
    # In its iptables mode it wants the bridge's traffic to be seen by it; else it takes nftables.
    if ! modprobe br_netfilter 2>/dev/null || ! in_host test -e /proc/sys/net/bridge/bridge-nf-call-iptables; then
        in_host nft add table ip flannel >/tmp/said 2>&1 || fail "neither br_netfilter nor nf_tables"
    fi
    for one in b podb; do run ip netns add $one; done
    run ip -n b link add cni0 type bridge
    run ip -n b addr add 10.2.0.1/24 dev cni0
    run ip -n b link set cni0 up
    cable eth0 podb vethpod b
    run ip -n b link set vethpod master cni0
    run ip -n podb addr add 10.2.0.2/24 dev eth0
    run ip -n podb route add default via 10.2.0.1
    cable b0 host a0 b
    run ip -n host addr add 198.51.100.1/24 dev b0
    run ip -n b addr add 198.51.100.2/24 dev a0
    ip netns exec b sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter'
    $1
    tcp pod 10.2.0.2 7000 podb 7000
}

by_routes() {
    run ip -n host route add 10.2.0.0/24 via 198.51.100.2
    run ip -n b route add 10.1.0.0/24 via 198.51.100.1
}
by_vxlan() {
    run ip -n host link add f1 type vxlan id 1 remote 198.51.100.2 local 198.51.100.1 dstport 8472 dev b0
    run ip -n b link add f1 type vxlan id 1 remote 198.51.100.1 local 198.51.100.2 dstport 8472 dev a0
    run ip -n host addr add 10.9.0.1/24 dev f1
    run ip -n b addr add 10.9.0.2/24 dev f1
    run ip -n host link set f1 up
    run ip -n b link set f1 up
    run ip -n host route add 10.2.0.0/24 via 10.9.0.2
    run ip -n b route add 10.1.0.0/24 via 10.9.0.1
}
by_wireguard() {
    wg genkey > /tmp/wg1; wg genkey > /tmp/wg2
    run ip -n host link add f1 type wireguard
    run ip -n b link add f1 type wireguard
    run in_host wg set f1 listen-port 51820 private-key /tmp/wg1 peer "$(wg pubkey < /tmp/wg2)" endpoint 198.51.100.2:51820 allowed-ips 0.0.0.0/0
    run ip netns exec b wg set f1 listen-port 51820 private-key /tmp/wg2 peer "$(wg pubkey < /tmp/wg1)" endpoint 198.51.100.1:51820 allowed-ips 0.0.0.0/0
    run ip -n host link set f1 up
    run ip -n b link set f1 up
    run ip -n host route add 10.2.0.0/24 dev f1
    run ip -n b route add 10.1.0.0/24 dev f1
}

iptables_one() {
    up
    run in_host "$1" -t nat -A POSTROUTING -s 10.1.0.0/24 -m comment --comment x -m mark ! --mark 0x9 -j MASQUERADE
    run in_host "$1" -A FORWARD -m conntrack --ctstate INVALID -j DROP
    run in_host "$1" -A FORWARD -p tcp -m multiport --dports 1,2 -j REJECT
    run in_host "$1" -t nat -A PREROUTING -p tcp -m addrtype ! --dst-type LOCAL --dport 99 -j DNAT --to-destination 192.0.2.2:7000
    tcp pod 192.0.2.9 99 world 7000
}

nftables() {
    up
    in_host nft -f - >/tmp/said 2>&1 <<RULES || fail "$(tail -n 1 /tmp/said)"
table ip t {
  chain post { type nat hook postrouting priority 100; ip saddr 10.1.0.0/24 masquerade; }
  chain pre { type nat hook prerouting priority -100; tcp dport 99 dnat to 192.0.2.2:7000; }
  chain forward { type filter hook forward priority 0; ct state invalid drop; tcp dport 1 reject; }
}
RULES
    tcp pod 192.0.2.9 99 world 7000
}

kube_proxy_iptables() {
    up
    one=$(iptables_of_this_kernel) || fail "no iptables: $(tail -n 1 /tmp/said)"
    run in_host $one -t nat -N KUBE-SEP
    run in_host $one -t nat -A KUBE-SEP -p tcp -m comment --comment svc -j DNAT --to-destination 192.0.2.2:7000
    run in_host $one -t nat -N KUBE-SVC
    run in_host $one -t nat -A KUBE-SVC -m comment --comment svc -m statistic --mode random --probability 1.0 -j KUBE-SEP
    run in_host $one -t nat -A PREROUTING -d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j KUBE-SVC
    run in_host $one -t nat -A PREROUTING -m addrtype --dst-type LOCAL -p tcp -m multiport --dports 31000,31001 -j KUBE-SVC
    run in_host $one -t mangle -A PREROUTING -d 10.96.0.1/32 -j MARK --set-xmark 0x4000/0x4000
    run in_host $one -t nat -A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE
    run in_host $one -A FORWARD -m conntrack --ctstate INVALID -j DROP
    run in_host $one -A FORWARD -d 10.96.0.2/32 -p tcp -j REJECT
    tcp pod 10.96.0.1 80 world 7000
}

kube_proxy_nftables() {
    up
    in_host nft -f - >/tmp/said 2>&1 <<RULES || fail "$(tail -n 1 /tmp/said)"
table ip kube-proxy {
  chain endpoint { meta mark set 0x4000; meta l4proto tcp dnat to 192.0.2.2:7000; }
  chain service { numgen random mod 1 vmap { 0 : goto endpoint }; }
  chain pre { type nat hook prerouting priority -100;
    ip daddr 10.96.0.1 tcp dport 80 goto service
    fib daddr type local tcp dport 31000 goto service
  }
  chain post { type nat hook postrouting priority 100; meta mark 0x4000 masquerade; }
  chain forward { type filter hook forward priority 0; ct state invalid drop; ip daddr 10.96.0.2 reject; }
}
RULES
    tcp pod 10.96.0.1 80 world 7000
}

ipvs_service() {
    run in_host ipset create local hash:ip
    run in_host ipset create ports hash:ip,port
    run in_host ipset create portip hash:ip,port,ip
    run in_host ipset create portnet hash:ip,port,net
    run in_host ipset create range bitmap:port range 1-100
    run in_host ipset add ports 10.96.0.1,tcp:80
    run ip -n host link add kube-ipvs0 type dummy
    run ip -n host addr add 10.96.0.1/32 dev kube-ipvs0
    in_host sh -c 'echo 1 > /proc/sys/net/ipv4/vs/conntrack' >/tmp/said 2>&1 || true
    run in_host ipvsadm -A -t 10.96.0.1:80 -s rr
    run in_host ipvsadm -a -t 10.96.0.1:80 -r 192.0.2.2:7000 -m
    in_host sh -c 'echo 1 > /proc/sys/net/ipv4/vs/conntrack' >/tmp/said 2>&1 || fail "no conntrack for IPVS"
}

kube_proxy_ipvs() {
    up
    one=$(iptables_of_this_kernel) || fail "no iptables: $(tail -n 1 /tmp/said)"
    ipvs_service
    run in_host $one -t nat -A PREROUTING -m comment --comment svc -m set --match-set ports dst,dst -j MARK --set-xmark 0x4000/0x4000
    run in_host $one -t nat -A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE
    run in_host $one -A FORWARD -m conntrack --ctstate INVALID -j ACCEPT
    tcp pod 10.96.0.1 80 world 7000
}

kube_router() {
    up
    one=$(iptables_of_this_kernel) || fail "no iptables: $(tail -n 1 /tmp/said)"
    modprobe br_netfilter 2>/dev/null
    in_host test -e /proc/sys/net/bridge/bridge-nf-call-iptables || fail "no br_netfilter"
    ipvs_service
    run in_host ipset create nets hash:net
    run in_host $one -t nat -A POSTROUTING -m ipvs --vdir ORIGINAL --vmethod MASQ -m comment --comment x -j MASQUERADE
    run in_host $one -A FORWARD -m set --match-set local src -m limit --limit 1/s -j REJECT
    run in_host $one -A FORWARD -m physdev --physdev-is-bridged -m mark --mark 0x5 -m addrtype --dst-type LOCAL -j REJECT
    run in_host $one -A FORWARD -p tcp -m multiport --dports 1,2 -m conntrack --ctstate INVALID -j DROP
    run in_host $one -t mangle -A FORWARD -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --set-mss 1400
    tcp pod 10.96.0.1 80 world 7000
}

calico_iptables() {
    up
    one=$(iptables_of_this_kernel) || fail "no iptables: $(tail -n 1 /tmp/said)"
    run ip -n host rule add fwmark 0x10 lookup 100
    run in_host ipset create pods hash:ip
    run in_host ipset create nets hash:net
    run in_host ipset create ports hash:ip,port
    run in_host ipset add pods 10.1.0.2
    # Its drop of forged sources: by the match, or by nftables where that is missing.
    in_host $one -t raw -A PREROUTING -i none -m rpfilter --invert -j DROP >/tmp/said 2>&1 ||
        in_host nft -f - >/tmp/said 2>&1 <<RULES || fail "$(tail -n 1 /tmp/said)"
table ip rp { chain pre { type filter hook prerouting priority -300; iifname "none" fib saddr . iif oif missing drop; }; }
RULES
    in_host $one -t raw -A PREROUTING -i none -j CT --notrack >/tmp/said 2>&1 ||
        run in_host nft 'add table ip tracks; add chain ip tracks c; add rule ip tracks c ct mark 1'
    in_host $one -A FORWARD -i none -j LOG >/tmp/said 2>&1 || run in_host nft 'add table ip lo; add chain ip lo c; add rule ip lo c log'
    run in_host $one -t nat -A POSTROUTING -s 10.1.0.0/24 -m comment --comment x -j MASQUERADE
    run in_host $one -A FORWARD -p tcp -m multiport --dports 1,2 -m mark --mark 0x5 -m addrtype --dst-type LOCAL -j REJECT
    run in_host $one -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
    run in_host $one -A FORWARD -m set ! --match-set pods src -j DROP
    tcp pod 192.0.2.2 7000 world 7000
    run in_host ipset del pods 10.1.0.2
    no_tcp pod 192.0.2.2 7001 world 7001
}

calico_nftables() {
    up
    run ip -n host rule add fwmark 0x10 lookup 100
    in_host nft -f - >/tmp/said 2>&1 <<RULES || fail "$(tail -n 1 /tmp/said)"
table ip calico {
  set pods { type ipv4_addr; elements = { 10.1.0.2 } }
  chain post { type nat hook postrouting priority 100; ip saddr 10.1.0.0/24 masquerade; }
  chain pre { type nat hook prerouting priority -100; tcp dport 99 dnat to 192.0.2.2:7000; }
  chain raw { type filter hook prerouting priority -300; iifname "none" fib saddr . iif oif missing drop; }
  chain forward { type filter hook forward priority 0;
    ct state established,related accept
    tcp dport 1 numgen random mod 2 0 limit rate 1/second log
    tcp dport 2 reject
    ip saddr != @pods drop
  }
}
RULES
    tcp pod 192.0.2.9 99 world 7000
    run in_host nft delete element ip calico pods '{ 10.1.0.2 }'
    no_tcp pod 192.0.2.2 7001 world 7001
}

edgemesh() {
    up
    one=$(iptables_of_this_kernel) || fail "no iptables: $(tail -n 1 /tmp/said)"
    run ip -n host link add edgemesh0 type bridge
    run ip -n host addr add 169.254.96.16/32 dev edgemesh0
    run ip -n host link set edgemesh0 up
    run in_host $one -t nat -A PREROUTING -d 10.96.0.1/32 -p tcp -m comment --comment x -j DNAT --to-destination 169.254.96.16:7000
    run in_host $one -t nat -A PREROUTING -m addrtype --dst-type LOCAL -p tcp --dport 31000 -j DNAT --to-destination 169.254.96.16:7000
    run in_host $one -t nat -A POSTROUTING -s 10.1.0.0/24 ! -d 10.1.0.0/24 -j MASQUERADE
    tcp pod 10.96.0.1 80 host 7000
}

# eBPF where Cilium and Calico put it: on a pod's veth in tc, and on a cgroup for connections.
ebpf() {
    down
    for one in pod host; do run ip netns add $one; run ip -n $one link set lo up; done
    cable eth0 pod lxc0 host
    run ip -n pod addr add 10.1.0.2/24 dev eth0
    run ip -n host addr add 10.1.0.1/24 dev lxc0
    run ip -n host rule add fwmark 0x10 lookup 100
    rm -f /run/bpf/truth-*
    run /truth/init pin sched_cls 2 /run/bpf/truth-drop
    run /truth/init pin sched_cls 0 /run/bpf/truth-pass
    tcp pod 10.1.0.1 7000 host 7000
    run tc -n host qdisc add dev lxc0 clsact
    # Not below /sys: `tc -n` mounts that anew for the other network, and programs pinned there would be out of sight.
    run tc -n host filter add dev lxc0 ingress prio 1 bpf da object-pinned /run/bpf/truth-drop
    no_tcp pod 10.1.0.1 7001 host 7001
    run tc -n host filter del dev lxc0 ingress
    run tc -n host filter add dev lxc0 ingress prio 1 bpf da object-pinned /run/bpf/truth-pass
    tcp pod 10.1.0.1 7002 host 7002
    run /truth/init deny-connect /sys/fs/cgroup/truth
    rm -f /run/bpf/truth-*
}

calico_ebpf() { ebpf; run ip -n host link add cx type vxlan external dstport 4789; }
cilium() { ebpf; [ -s /sys/kernel/btf/vmlinux ] || fail "no type information"; }
cilium_old() { ebpf; }
cilium_vxlan() { ebpf; run ip -n host link add cx type vxlan external dstport 8472; run ip -n host link set cx up; }
cilium_geneve() { ebpf; run ip -n host link add cx type geneve external; run ip -n host link set cx up; }
cilium_bandwidth() { ebpf; run tc -n host qdisc add dev lxc0 root fq; tcp pod 10.1.0.1 7003 host 7003; }
cilium_wireguard() { flannel_less by_wireguard; }

# WireGuard alone: Cilium needs neither a bridge nor rules for it.
flannel_less() {
    down
    for one in host b; do run ip netns add $one; run ip -n $one link set lo up; done
    cable b0 host a0 b
    run ip -n host addr add 198.51.100.1/24 dev b0
    run ip -n b addr add 198.51.100.2/24 dev a0
    run ip -n host addr add 10.1.0.1/32 dev lo
    run ip -n b addr add 10.2.0.1/32 dev lo
    $1
    tcp host 10.2.0.1 7000 b 7000
}

# A container by hand: layers, limits, namespaces.
containerd() {
    down
    rm -rf /tmp/c; mkdir -p /tmp/c; run mount -t tmpfs c /tmp/c
    mkdir -p /tmp/c/lower/bin /tmp/c/upper /tmp/c/work /tmp/c/root
    cp /bin/busybox /tmp/c/lower/bin/
    if ! mount -t overlay overlay -o lowerdir=/tmp/c/lower,upperdir=/tmp/c/upper,workdir=/tmp/c/work /tmp/c/root 2>/tmp/said; then
        umount /tmp/c; fail "overlay: $(tail -n 1 /tmp/said)"
    fi
    echo '+memory +pids +cpu +cpuset' > /sys/fs/cgroup/cgroup.subtree_control 2>/tmp/said || { umount /tmp/c/root /tmp/c; fail "no controllers"; }
    mkdir -p /sys/fs/cgroup/truthc
    echo 64M > /sys/fs/cgroup/truthc/memory.max 2>/tmp/said && echo 50 > /sys/fs/cgroup/truthc/pids.max 2>>/tmp/said
    limits=$?
    word=$(sh -c 'echo $$ > /sys/fs/cgroup/truthc/cgroup.procs; exec /usr/sbin/unshare -m -n -p -i -u -f chroot /tmp/c/root /bin/busybox sh -c "echo x > /new; echo \$\$"' 2>/tmp/said)
    [ -e /tmp/c/upper/new ]; written=$?
    umount /tmp/c/root /tmp/c
    rmdir /sys/fs/cgroup/truthc 2>/dev/null
    [ $limits = 0 ] || fail "no limits"
    [ "$word" = 1 ] || fail "no container: $(tail -n 1 /tmp/said)"
    [ $written = 0 ] || fail "nothing in the upper layer"
    run /truth/init deny-device /sys/fs/cgroup/truth
}

profile=$1
case $profile in
    iptables-legacy | iptables-nft) iptables_one "$profile" ;;
    flannel-vxlan) flannel by_vxlan ;;
    flannel-host-gw) flannel by_routes ;;
    flannel-wireguard) flannel by_wireguard ;;
    cilium-1.19.2) cilium_old ;;
    *) "$(echo "$profile" | tr - _)" ;;
esac
code=$?
down
exit $code
