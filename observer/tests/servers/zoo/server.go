// The handler of the zoo's Go server: `/stall` blocks its thread in a system call for 150 ms, which blocks no other.
package main

import (
	"fmt"
	"net/http"
	"os"
	"syscall"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/stall" {
			t := syscall.NsecToTimespec(150e6)
			syscall.Nanosleep(&t, nil)
		}
		fmt.Fprint(w, "ok")
	})
	fmt.Println(http.ListenAndServe("127.0.0.1:"+os.Args[1], nil))
}
