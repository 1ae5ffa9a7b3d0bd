// Names every kernel field that observer reads, so that `bpftool gen min_core_btf` keeps just those
// of a kernel's BTF. See README.md for how the fixtures beside this file are made.
typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long long u64;
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct atomic { int counter; };
struct fdtable { u32 max_fds; void **fd; };
struct files_struct { struct fdtable *fdt; };
struct signal_struct { struct atomic live; };
struct task_struct { int pid; int tgid; struct files_struct *files; struct signal_struct *signal; u32 __state; };
struct task_struct___old { long state; };
struct inode { unsigned long i_ino; };
struct file { void *private_data; struct inode *f_inode; };
struct ns_common { u32 inum; };
struct net { struct ns_common ns; };
struct possible_net { struct net *net; };
struct sock_common { u16 skc_family; u16 skc_num; struct { struct net *net; } skc_net; };
struct sock { struct sock_common __sk_common; u16 sk_protocol; u32 sk_ack_backlog; u32 sk_max_ack_backlog; };
struct socket { struct file *file; struct sock *sk; };
#pragma clang attribute pop
typedef void (*btf_trace_sched_switch)(void);
#define READ(field) sink = (u64)(unsigned long)__builtin_preserve_access_index(&field)
volatile u64 sink;
__attribute__((section("raw_tp/x"), used)) int fields(void *ctx) {
    struct task_struct *t = ctx; struct task_struct___old *o = ctx; struct files_struct *fs = ctx; struct fdtable *ft = ctx;
    struct signal_struct *s = ctx; struct inode *i = ctx; struct file *f = ctx; struct net *n = ctx; struct sock *k = ctx; struct socket *c = ctx;
    READ(t->pid); READ(t->tgid); READ(t->files); READ(t->signal); READ(t->__state); READ(o->state);
    READ(fs->fdt); READ(ft->max_fds); READ(ft->fd); READ(s->live.counter); READ(i->i_ino); READ(f->private_data); READ(f->f_inode);
    READ(n->ns.inum); READ(k->__sk_common.skc_family); READ(k->__sk_common.skc_num); READ(k->__sk_common.skc_net.net);
    READ(k->sk_protocol); READ(k->sk_ack_backlog); READ(k->sk_max_ack_backlog); READ(c->file); READ(c->sk);
    sink = __builtin_preserve_type_info(*(btf_trace_sched_switch *)0, 0);
    return 0;
}
char LICENSE[] __attribute__((section("license"), used)) = "GPL";
