/* Draws by the vDSO's getrandom, as C libraries do since glibc 2.41: eight bytes every 50 ms. Exit status 77 where there is none. */
#define _GNU_SOURCE
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <unistd.h>

typedef ssize_t (*draw_function)(void *, size_t, unsigned, void *, size_t);
struct parameters { uint32_t state_bytes, prot, flags, reserved[13]; }; /* kernel 6.11, linux/random.h */

static draw_function find(void)
{
	char *vdso = (char *)getauxval(AT_SYSINFO_EHDR);
	Elf64_Ehdr *header = (Elf64_Ehdr *)vdso;
	Elf64_Shdr *sections = (Elf64_Shdr *)(vdso + header->e_shoff);
	for (int i = 0; i < header->e_shnum; i++) {
		if (sections[i].sh_type != SHT_DYNSYM) continue;
		Elf64_Sym *symbols = (Elf64_Sym *)(vdso + sections[i].sh_offset);
		char *names = vdso + sections[sections[i].sh_link].sh_offset;
		for (size_t s = 0; s < sections[i].sh_size / sizeof *symbols; s++)
			if (!strcmp(names + symbols[s].st_name, "__vdso_getrandom")) return (draw_function)(vdso + symbols[s].st_value);
	}
	return 0;
}

int main(void)
{
	struct parameters p = {0};
	draw_function draw = find();
	if (!draw || draw(0, 0, 0, &p, ~0UL)) return 77;
	void *state = mmap(0, 4096, (int)p.prot, (int)p.flags, -1, 0);
	if (state == MAP_FAILED) return 77;
	for (uint64_t drawn;; usleep(50000)) {
		if (draw(&drawn, sizeof drawn, 0, state, p.state_bytes) != sizeof drawn) return 1;
		printf("%016lx\n", (unsigned long)drawn);
		fflush(stdout);
	}
}
