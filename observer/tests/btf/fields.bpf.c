// Names every kernel field that observer reads, so that `bpftool gen min_core_btf` keeps just those
// of a kernel's BTF. See README.md for how the fixtures beside this file are made.
typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long long u64;
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct atomic { int counter; };
struct fdtable { u32 max_fds; void **fd; };
struct files_struct { struct fdtable *fdt; };
struct signal_struct { struct atomic live; };
struct thread_struct { unsigned long fsbase; };
struct task_struct { void *stack; int pid; int tgid; struct files_struct *files; struct signal_struct *signal; u32 __state; struct thread_struct thread; };
struct task_struct___old { long state; };
struct inode { unsigned long i_ino; u16 i_mode; };
struct pt_regs { unsigned long orig_ax, di, si, dx, bp; };
struct file { void *private_data; struct inode *f_inode; };
struct ns_common { u32 inum; };
struct net { struct ns_common ns; };
struct possible_net { struct net *net; };
struct in6 { char bytes[16]; };
struct sock_common { u16 skc_family; u16 skc_num; unsigned char skc_state; u32 skc_rcv_saddr; struct in6 skc_v6_rcv_saddr; struct { struct net *net; } skc_net; };
struct sk_buff; struct sk_buff_head { struct sk_buff *next; u32 qlen; };
struct sk_buff { struct sock *sk; };
struct sock { struct sock_common __sk_common; u16 sk_protocol; u16 sk_type; u32 sk_ack_backlog; u32 sk_max_ack_backlog;
    struct atomic sk_drops; struct sk_buff_head sk_receive_queue; void *sk_socket; };
struct socket { struct file *file; struct sock *sk; };
struct request_sock { struct request_sock *dl_next; struct sock *sk; };
struct request_sock_queue { unsigned char rskq_defer_accept; struct atomic qlen; struct request_sock *rskq_accept_head; };
struct inet_connection_sock { struct request_sock_queue icsk_accept_queue; void *icsk_ulp_data; };
struct mptcp_sock { struct sock *first; }; struct mptcp_subflow_context { struct sock *conn; };
struct sockaddr_un { u16 sun_family; };
struct unix_address { int len; struct sockaddr_un name[0]; };
struct unix_sock { struct unix_address *addr; struct sock *peer; };
struct io_cqe { u64 user_data; int fd; };
struct io_kiocb { struct file *file; unsigned char opcode; u32 flags; struct io_cqe cqe; void *ctx; };
struct io_kiocb___old { u64 user_data; };
struct io_accept { u32 file_slot; };
struct io_uring_cqe { u64 user_data; int res; u32 flags; };
struct bpf_iter__task_file { struct task_struct *task; u32 fd; struct file *file; };
#pragma clang attribute pop
#define READ(field) sink = (u64)(unsigned long)__builtin_preserve_access_index(&field)
volatile u64 sink;
__attribute__((section("raw_tp/x"), used)) int fields(void *ctx) {
    struct task_struct *t = ctx; struct pt_regs *p = ctx; struct task_struct___old *o = ctx; struct files_struct *fs = ctx; struct fdtable *ft = ctx;
    struct signal_struct *s = ctx; struct inode *i = ctx; struct file *f = ctx; struct net *n = ctx; struct sock *k = ctx; struct socket *c = ctx;
    struct request_sock *r = ctx; struct inet_connection_sock *ic = ctx; struct unix_address *ua = ctx; struct unix_sock *us = ctx; struct bpf_iter__task_file *it = ctx;
    struct sk_buff *b = ctx; struct io_kiocb *q = ctx; struct io_kiocb___old *qo = ctx; struct io_accept *ac = ctx; struct io_uring_cqe *e = ctx;
    struct mptcp_sock *ms = ctx; struct mptcp_subflow_context *mc = ctx;
    READ(t->pid); READ(t->tgid); READ(t->files); READ(t->signal); READ(t->__state); READ(o->state);
    READ(fs->fdt); READ(ft->max_fds); READ(ft->fd); READ(s->live.counter); READ(i->i_ino); READ(f->private_data); READ(f->f_inode);
    READ(n->ns.inum); READ(k->__sk_common.skc_family); READ(k->__sk_common.skc_num); READ(k->__sk_common.skc_net.net);
    READ(k->sk_protocol); READ(k->sk_ack_backlog); READ(k->sk_max_ack_backlog); READ(c->file); READ(c->sk);
    READ(k->__sk_common.skc_state); READ(k->__sk_common.skc_rcv_saddr); READ(k->__sk_common.skc_v6_rcv_saddr); READ(k->sk_type);
    READ(k->sk_drops.counter); READ(k->sk_receive_queue.qlen); READ(k->sk_socket); READ(r->dl_next); READ(r->sk);
    READ(ic->icsk_accept_queue.qlen.counter); READ(ic->icsk_accept_queue.rskq_accept_head);
    READ(ic->icsk_accept_queue.rskq_defer_accept);
    READ(ua->len); READ(ua->name[0].sun_family); READ(us->addr); READ(it->task); READ(it->file); READ(it->fd);
    READ(us->peer); READ(k->sk_receive_queue.next); READ(b->sk); READ(q->file); READ(q->opcode); READ(q->flags); READ(q->ctx);
    READ(q->cqe.user_data); READ(qo->user_data); READ(q->cqe.fd); READ(ac->file_slot); READ(e->user_data); READ(e->res); READ(e->flags);
    READ(ic->icsk_ulp_data); READ(ms->first); READ(mc->conn);
    READ(t->stack); READ(i->i_mode); READ(p->orig_ax); READ(p->di); READ(p->si); READ(p->dx); READ(p->bp); READ(t->thread.fsbase);
    return 0;
}
char LICENSE[] __attribute__((section("license"), used)) = "GPL";
