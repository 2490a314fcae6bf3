// A small HTTP server that goes on allocating, collecting and giving memory back, and looks whether what it is given is zero.
//
// usage: churn PORT MIB
package main

import (
	"fmt"
	"math/rand"
	"net/http"
	"os"
	"runtime/debug"
	"strconv"
	"sync"
)

const blockBytes = 1 << 20

var (
	held  [][]byte // block i is full of byte i
	mutex sync.Mutex
)

func isAll(block []byte, b byte) bool {
	for _, x := range block {
		if x != b {
			return false
		}
	}
	return true
}

func fill(block []byte, b byte) {
	for i := range block {
		block[i] = b
	}
}

// churn allocates blocks, counts those that are not zero, makes them dirty and lets go of most of them.
func churn(rounds int) (wrong int) {
	kept := make([][]byte, 64)
	for i := 0; i < rounds; i++ {
		block := make([]byte, 1<<(10+rand.Intn(11)))
		if !isAll(block, 0) {
			wrong++
		}
		fill(block, 0xa5)
		kept[rand.Intn(len(kept))] = block
		if i%500 == 499 {
			debug.FreeOSMemory() // collects, and gives the memory back by madvise, which Go calls itself
		}
	}
	return wrong
}

func main() {
	mib, _ := strconv.Atoi(os.Args[2])
	for i := 0; i < mib; i++ {
		held = append(held, make([]byte, blockBytes))
		fill(held[i], byte(i))
	}
	http.HandleFunc("/health", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "ok") })
	http.HandleFunc("/check", func(w http.ResponseWriter, r *http.Request) {
		mutex.Lock()
		defer mutex.Unlock()
		rounds, _ := strconv.Atoi(r.URL.Query().Get("rounds"))
		wrong := churn(rounds)
		for i, block := range held {
			if !isAll(block, byte(i)) {
				wrong++
			}
		}
		fmt.Fprintf(w, "{\"wrong\": %d, \"held\": %d}", wrong, len(held))
	})
	panic(http.ListenAndServe("127.0.0.1:"+os.Args[1], nil))
}
